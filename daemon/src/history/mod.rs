//! Checkpoint history: the only user of git2.
