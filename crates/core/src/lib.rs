//! The pure domain of Fermata: what may happen, what follows from it, and what it does to the state.
//!
//! ```text
//!   Command ──decide(&Project, command, now)──► Decision { events, effects } | Refusal
//!   Event   ──apply(&mut Project, event, at)──► the next state
//! ```
//!
//! There is no tokio, file, clock, randomness or logger here: `now` and new ids are parameters.
//! The daemon persists the events, then applies them, then carries out the effects; recovery
//! after a crash sends `Command::Recover` down the same road.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod agent;
pub mod apply;
pub mod budget;
pub mod clock;
pub mod command;
pub mod context;
pub mod decide;
pub mod dependency;
pub mod due;
pub mod load;
pub mod pressure;
pub mod project;
pub mod redact;
pub mod restart;
pub mod resume_command;
pub mod retention;
pub mod score;
pub mod since;
pub mod transition;
pub mod view;

pub use apply::apply;
pub use command::{Command, Decision, Effect};
pub use decide::decide;
pub use project::{Project, ProjectState};
