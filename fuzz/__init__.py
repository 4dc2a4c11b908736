"""Damaged and hostile files for everything of metabook that reads one.

    make fuzz                                          every target for a minute
    make fuzz ARGS="--seconds 600 --only config"       one of them for ten

A target (`fuzz.targets`) is a reader of the library and what its documentation says that it raises.  It is given bytes,
as a file or a folder of its own.  It fails when anything else is raised, when an error does not name the file, when it
needs more than ten seconds or the target's bound of memory, when it writes outside its folder, starts a program, opens a
connection or unpickles.

The fuzzer is atheris, which looks for bytes that lead through new parts of the code.  It starts from small valid files,
which `fuzz.seeds` makes, and keeps what it learned in `build/fuzz/NAME`; `build/fuzz/NAME.log` is its report.  Where a
format has an inner structure (JSON), `fuzz.mutations` also changes that.

What is found is written down in base64.  Mend the reader, and add the bytes to the table in
`tests/system/test_fuzzed.py`: it also gives every target a few random changes of its seeds, without atheris.

A new reader is one more line in `fuzz.targets.TARGETS`.

The last search: 90 seconds for each target, `folder` 150, on one core of a machine that others shared, with atheris 3.0
and Python 3.11; where something had been found, after it was mended.  Runs in thousands: config 156, folder 77,
settings 117, results 102, zip 72, tar 49, omniglot 8, cifar 24, mini 25, images 35, kept 32.  Found by the fuzzer, in
its first seconds: lists, names of classes and results in another encoding than UTF-8, and an empty file of results, were
no errors that name the file.  Found by reading the readers for the targets: archives that unpack to any amount of memory
(a zip that lies about sizes, a tar with long headers, a tar that leads back into itself), rows without a class, lines
without an end, pictures named from the root, files outside all folders, superclasses without classes, and results of
another shape.
"""
