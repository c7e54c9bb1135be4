//! Starts the runs of agents: their commands and sessions, their limits, and when they are ready.

pub mod launch;
pub mod limits;
pub mod readiness;
pub mod session;
