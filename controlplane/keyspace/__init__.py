"""What a cluster keeps in etcd, folded once for every plane: view.py. It knows the contract and the etcd client."""
