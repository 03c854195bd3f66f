"""etcd for every process of ours: client, watches, leases, leadership, and how to start a server.

    EtcdClient (client.py)   -> Endpoints (endpoints.py): which member, what a failed call means
      .watch_prefix()        -> Watch (watch.py): snapshot, then changes, for ever
      .lease_keeper()        -> LeaseKeeper (lease.py)
    Election (election.py)   -> Leadership: guard(), valid(), lost
    server.py                   find and start an etcd binary

It imports nothing of ours, so that the data plane and the gateway may use it too.
"""
