//! The steps of operations. Each runs beside the project's actor, reports once, and has an undo
//! that may be repeated.
//!
//! ```text
//!   pause:       validate -> quiesce -> freeze -> plan_flash_save -> checkpoint     undo: thaw, discard
//!   checkpoint:  freeze (a blip) -> checkpoint -> thaw                              undo: thaw, discard
//!   restore:     safety checkpoint -> plan on disk | apply                          rolls forward
//!   import:      unpack -> check -> place                                           undo: discard
//!   resume:      thaw | end what is left, launch                                    rolls forward
//! ```
//!
//! A step knows the state that it was started with and changes none: what follows from its report
//! is `fermata_core`'s decision.

mod cancel;
pub mod checkpoint;
mod context;
mod history_cell;
pub mod maintenance;
pub mod pause;
mod progress;
pub mod restore;
pub mod run;

pub use cancel::Cancel;
pub use context::{Link, StepContext, blocking, failpoint, ms_since, side_by_side};
pub use history_cell::HistoryCell;
