"""Requests to delete data: ledger, processing, gates, promotion, signed certificates."""
