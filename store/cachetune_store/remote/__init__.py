"""What many machines share: chunks, documents and notes in an object store or in Valkey.

Nothing here is imported by a store without a remote tier.
"""
