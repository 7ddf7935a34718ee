"""A local Hub: the protocol of huggingface_hub over bare git repositories, for tests. Needs `git` and the standard library.

store.py    repositories and large files on disk      messages.py  requests, answers, refusals
api.py      facts and references over HTTP            transfer.py  bytes in and out
accounts.py who may do what                           faults.py    what may go wrong
server.py   two listeners: the Hub and its CDN        machine.py   a fresh user on another machine
"""
