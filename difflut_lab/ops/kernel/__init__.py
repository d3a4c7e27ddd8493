"""What the fast backends of the ops share."""
