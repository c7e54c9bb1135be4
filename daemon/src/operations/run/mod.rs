//! Starts the runs of agents: commands and sessions, resource limits, readiness.

pub mod launch;
pub mod limits;
pub mod readiness;
pub mod session;
