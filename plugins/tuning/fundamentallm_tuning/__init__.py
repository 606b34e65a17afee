"""Try settings before a run: does it work, which learning rate, which batch size?

``command`` holds the commands, ``trial`` what they share: a short run that leaves nothing behind.
"""
