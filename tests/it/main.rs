//! The daemon's integration tests: one module per command.

mod checkpoint;
mod pause;
mod pause_crash;
mod restore;
mod scene;
