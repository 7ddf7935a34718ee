"""Durable files: written whole or not at all, copied, locked, hashed, and read without trusting what they are.

`atomic` writes, `scratch` cleans up after killed processes, `copying` copies, `locks` locks, `hashing` hashes what is being
written, `flushing` has the disk write meanwhile, `reading` opens files of unknown origin, `threads` runs work
in other threads.
"""
