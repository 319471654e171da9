"""Training: objective, optimizers, step, data, loop, evaluation, generation."""

if __name__ != "mmfn.train":
    raise ImportError("the folder `train` is a link to the package mmfn.train; write `import mmfn.train`")
