"""Plasticity against retention: small settings of real data, the methods that are compared, and what is measured."""
