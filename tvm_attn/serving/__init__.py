"""The server: an ASGI application over `Model.scheduler`, its page, and replicas of it."""
