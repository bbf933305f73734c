"""report.html: one self-contained page about a run, or about several runs side by side.

May import `config`, `errors`, `process` without torch, and what reads and hides in `track`; imports no torch.
"""
