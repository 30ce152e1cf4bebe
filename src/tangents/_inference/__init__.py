"""From kernels to answers: solvers, predictions, uncertainty, spectra."""
