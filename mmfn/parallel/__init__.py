"""Programs and their transforms: how a model's functions run on one device or on a mesh."""

if __name__ != "mmfn.parallel":
    raise ImportError("the folder `parallel` is a link to the package mmfn.parallel; write `import mmfn.parallel`")
