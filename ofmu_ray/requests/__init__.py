"""Requests to forget: a ledger of them, their intake, and the encrypted rows they name."""
