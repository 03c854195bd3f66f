"""Where the control plane meets the world: etcd, gRPC, the clock, SQL. Decisions are all in `controlplane.core`.

registry.py  etcd -> events        rpc.py      node reports -> events
runtime.py   events -> Controller -> effects -> performer.py -> etcd, history
service.py   what the admin API asks for; metrics.py what Prometheus does
"""
