"""`kfadmin pod`: what runs in a pod of the Helm chart (deploy/helm/kevlarflow)."""
