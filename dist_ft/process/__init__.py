"""Worker processes: rank and device, collectives, watchdog, failure report, entry point of commands.

Imports `config`, `errors` and `state`.
"""
