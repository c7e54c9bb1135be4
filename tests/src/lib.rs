//! The harness of the integration tests: a [`Sandbox`] with a real daemon of its own, workspaces
//! in it, and waiting with deadlines.
//!
//! The harness uses only the public interfaces of the daemon: it starts the binaries, speaks the protocol, and
//! inspects processes, files and cgroups from outside.

pub mod cgroup;
pub mod disk;
pub mod metronome;
pub mod passages;
pub mod process;
pub mod recorder;
pub mod sandbox;
pub mod waiting;
pub mod workspace;

pub use disk::{Disk, ReadOnly};
pub use sandbox::{Sandbox, SandboxBuilder};
pub use waiting::{wait_for, wait_until};
pub use workspace::{Fingerprint, Workspace};
