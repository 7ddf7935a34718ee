"""Signed lists of versions: a publisher pushes packs to a channel, machines follow it.

`push`, `yank` and `renew` are in publish.py, `pull` and `follow` in follow.py, the rules in rules.py, the file in listing.py.
"""
