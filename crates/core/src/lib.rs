//! The pure domain of Fermata: what may happen, what follows from it, and how it changes the state.
//!
//! ```text
//!   Command ──decide(&Project, command, now)──► Decision { events, effects } | Refusal
//!   Event   ──apply(&mut Project, event, at)──► the next state
//! ```
//!
//! There is no tokio, file, clock, randomness or logger here: `now` and new ids are parameters.
//! The daemon persists the events, then applies them, then carries out the effects; recovery
//! after a crash goes the same way, with `Command::Recover`.
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::wildcard_enum_match_arm))]

pub mod activity;
pub mod agent;
pub mod apply;
pub mod automatic;
pub mod budget;
pub mod clock;
pub mod command;
pub mod context;
pub mod deadlines;
pub mod decide;
pub mod dependency;
pub mod effect;
mod hash;
pub mod load;
pub mod pressure;
pub mod project;
pub mod redact;
pub mod restart;
pub mod resume_command;
pub mod retention;
pub mod score;
pub mod transition;
pub mod view;

pub use apply::apply;
pub use command::{Command, Decision};
pub use decide::decide;
pub use effect::Effect;
pub use project::{Project, ProjectState};
