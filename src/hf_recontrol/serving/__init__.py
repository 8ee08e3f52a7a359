"""Heads in servers: plug-ins and launchers. Nothing else in the package imports them."""
