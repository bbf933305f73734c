"""From the words of a command and the YAML files of `conf/` to a checked `RunConfig`.

Imports nothing else of `launch`.
"""
