//! One actor per project. It owns the state; every change goes through its mailbox.
//!
//! ```text
//!   Tell / Begin / CommandReport ──► mailbox ──► decide ──► one transaction ──► apply ──► reply, wake
//!                                 ▲                                          │
//!                                 └────────── step task ◄── effects ─────────┘
//! ```
//!
//! The actor publishes the state after every commit; reading it needs no message.

mod actor;
pub mod automatic;
mod blocked;
mod conclude;
mod effects;
mod follow_up;
mod handle;
mod ids;
mod instants;
mod links;
mod message;
mod pause_work;
mod registry;
mod restoring;
mod retain;
mod retry;
mod scan;
mod staging;
mod subjects;

pub use actor::{Actor, Adopted};
pub use follow_up::start;
pub use handle::ProjectHandle;
pub use ids::{NewToken, new_boot_epoch, new_operation, new_run};
pub use links::{RunInspection, exit_status, inspect_run};
pub use message::{ActorMessage, Begin, CommandReport, Label, Retain, Tell, View};
pub use registry::Projects;
pub use scan::before_shutdown;
pub use subjects::subjects;
