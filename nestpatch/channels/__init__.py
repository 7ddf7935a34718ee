"""Channels: signed lists of pack versions, read, remembered, followed and published."""
