//! One actor per project: it owns the state, and everything that changes it goes through its mailbox.
//!
//! ```text
//!   Tell / Begin / Outcome ──► mailbox ──► decide ──► one transaction ──► apply ──► reply, wake
//!                                 ▲                                          │
//!                                 └────────── step task ◄── effects ─────────┘
//! ```
//!
//! Looking needs no mailbox: the state is published after every commit, so `status` answers at
//! once whatever the actor is doing.

mod actor;
pub mod automatic;
mod conclude;
mod drafting;
mod effects;
mod follow_up;
mod handle;
mod ids;
mod instants;
mod links;
mod look;
mod message;
mod registry;
mod restoring;
mod retain;
mod retry;
mod stuck;
mod subjects;

pub use actor::{Actor, Adopted};
pub use follow_up::start;
pub use handle::ProjectHandle;
pub use ids::{NewToken, new_boot_epoch, new_operation, new_run};
pub use links::{Found, exit_status, observe};
pub use look::before_shutdown;
pub use message::{Begin, Label, Message, Outcome, Retain, Tell, View};
pub use registry::Projects;
pub use subjects::subjects;
