"""lnprune inside other packages: one module for each, imported by those who have it installed."""
