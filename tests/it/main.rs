//! The daemon's integration tests: one module per command.

fn main() {}
