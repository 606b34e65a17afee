"""Try settings before a run: does it work, which learning rate, which batch size?

``cli`` defines the commands. ``trial`` runs the user's settings in small, in a temporary folder.
"""
