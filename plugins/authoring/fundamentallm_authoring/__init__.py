"""Commands for authors of settings and plugins: ``schema``, ``init``, ``new``, ``reference``.

``fields`` reads the settings of a plugin class. ``schema``, ``sheet`` (init) and ``reference``
write them as JSON Schema, as a settings file and as tables. ``scaffold`` (new) fills the templates.
"""
