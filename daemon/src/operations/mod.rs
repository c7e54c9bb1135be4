//! The steps of operations. A step runs in a task beside the project's actor, reports its result once, and has an undo
//! that may be repeated.
//!
//! ```text
//!   pause:       validate -> quiesce -> freeze -> plan_flash_save -> checkpoint     undo: thaw, discard
//!   checkpoint:  freeze (briefly) -> checkpoint -> thaw                             undo: thaw, discard
//!   restore:     safety checkpoint -> plan on disk | apply                          rolls forward
//!   import:      unpack -> check -> rename into place                               undo: discard
//!   resume:      thaw | end the remaining processes, launch                         rolls forward
//! ```
//!
//! A step reads the project state that it was started with and changes none. `fermata_core` decides what follows from
//! its result.

mod cancel;
pub mod checkpoint;
mod context;
mod directory;
mod history_cell;
pub mod maintenance;
pub mod pause;
mod progress;
pub mod restore;
pub mod run;

pub use cancel::Cancel;
pub use context::{AgentLink, StepContext, blocking, failpoint, ms_since, side_by_side};
pub use history_cell::HistoryCell;
