"""Commands for those who write settings and plugins: ``schema``, ``init``, ``new``, ``reference``.

``fields`` reads the settings of a plugin class once; ``schema``, ``sheet`` (init) and ``reference``
each show them in a form of their own; ``scaffold`` (new) fills the templates.
"""
