"""A program written for neural-tangents runs after one changed import line."""


def test_program_of_the_readme():
    from jax import random

    import tangents as nt
    from tangents import stax

    k1, k2, k3, k4 = random.split(random.PRNGKey(1), 4)
    x1 = random.normal(k1, (20, 32, 32, 3))
    x2 = random.normal(k2, (10, 32, 32, 3))
    init_fn, f, _ = stax.serial(
        stax.Conv(32, (3, 3)),
        stax.Relu(),
        stax.Conv(32, (3, 3)),
        stax.Relu(),
        stax.Conv(32, (3, 3)),
        stax.Flatten(),
        stax.Dense(10),
    )
    _, params = init_fn(k3, x1.shape)
    ntk_vp_fn = nt.empirical_ntk_vp_fn(f, x1, x2, params)
    cotangents = random.normal(k4, f(params, x2).shape)
    assert ntk_vp_fn(cotangents).shape == f(params, x1).shape
