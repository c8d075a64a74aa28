"""What tests share: tiny models, folders on disk, processes. No tests."""
