"""Budgets, costs and plans, as plain data."""
