"""A loaded model as engines hold it: a view of its weights, its identity, and how changes are noticed."""
