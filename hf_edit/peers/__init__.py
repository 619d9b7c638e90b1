"""Who talks to whom: inside a replica, and across the replicas. Nobody else calls a collective.

Nothing here knows what is being synchronised.
"""
