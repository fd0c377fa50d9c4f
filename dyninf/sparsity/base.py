"""The identity element of sparse prefill."""

from dyninf.pytree import pytree


@pytree()
class Dense:
    """Attend every block: exact."""
