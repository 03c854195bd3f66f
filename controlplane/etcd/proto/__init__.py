"""The part of etcd's v3 gRPC interface that we speak; `generate.py` makes `*_pb2*` from the `.proto` files."""
