"""What runs inside the sandbox, beside a program that nobody trusts. The files are handed in as text (sandbox.py):
they use the standard library alone, and hold nothing that a program must not read."""
