"""How the tangent kernel of a small network moves while it is trained.

Prints, along training on a regression problem, the loss, the distance of the kernel from where it
began (one less the cosine between the two matrices), and its largest eigenvalue by Lanczos on the
operator: the matrix is made for the distance only. `op.at(params)` moves the operator to other
parameters and compiles nothing again. Needs `pip install "tangents[scipy]"`.
"""

import jax
import jax.numpy as jnp
from scipy.sparse.linalg import eigsh

import tangents


def network(params, x):
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def initial_parameters(key, sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (m, n)) / jnp.sqrt(m), jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def main():
    x = jnp.linspace(-2.0, 2.0, 40)[:, None]
    y = jnp.sin(3.0 * x) * x
    params = initial_parameters(jax.random.key(0), [1, 64, 64, 1])

    def loss(p):
        return 0.5 * jnp.mean((network(p, x) - y) ** 2)

    @jax.jit
    def descend(p):
        return jax.tree.map(lambda a, g: a - 0.1 * g, p, jax.grad(loss)(p))

    op = tangents.ntk_operator(network, params, x, vmap_axes=0)
    start = op.materialise()
    print("  step     loss  distance  largest eigenvalue")
    for step in range(2001):
        if step % 400 == 0:
            op = op.at(params)
            kernel = op.materialise()
            cosine = jnp.vdot(kernel, start) / jnp.linalg.norm(kernel) / jnp.linalg.norm(start)
            top = eigsh(op.linear_operator(), k=1, return_eigenvectors=False)[0]
            distance = jnp.maximum(1 - cosine, 0.0)
            print(f"{step:6d}  {loss(params):7.4f}  {distance:8.4f}  {top:18.2f}")
        params = descend(params)


if __name__ == "__main__":
    main()
