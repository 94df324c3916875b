"""A study: methods x seeds in one folder, resumed where it stopped, and one page of what was measured.

In order: ``config`` and ``defaults`` say what is run and claimed, ``plan`` makes the units, ``run`` and ``worker``
train them, ``results`` reads them, ``claims`` decides, ``figures``, ``tables`` and ``page`` show.
"""
