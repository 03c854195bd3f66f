"""The dashboard's static files. They are served by `web.admin`, which finds them as package data."""
