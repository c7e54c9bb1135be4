//! The stable C ABI of Fermata plugins, and the safe Rust traits over it.
//!
//! A plugin is a shared object that exports one symbol, [`abi::SYMBOL`], a function that returns a
//! table of functions ([`abi::FermataPluginV1`]). Requests and replies are JSON bytes. The layouts
//! are frozen: tables begin with their own `size` and only ever grow at the end; an incompatible
//! change gets a new symbol name.
//!
//! ```text
//!   abi      the layouts and numbers, described once; the C header is rendered from them
//!   header   that rendering (include/fermata_plugin.h is its output, a test compares them)
//!   message  the JSON documents that travel through the ABI
//!   plugin   what a Rust author implements: Plugin, Checkpointer, Notifier
//!   glue     Plugin -> table of C functions (used by export_plugin!)
//!   host     table of C functions -> safe calls (used by fermata-plugin-host)
//! ```
//!
//! This crate loads nothing and starts nothing: opening a shared object is the host's business.
//!
//! # A plugin in Rust
//!
//! ```
//! use fermata_plugin_api::{Description, Failure, Host, Kind, Notifier, Plugin, export_plugin};
//! use serde_json::Value;
//!
//! struct Bell {
//!     host: Host,
//! }
//!
//! impl Plugin for Bell {
//!     fn describe() -> Description {
//!         Description::new("bell", env!("CARGO_PKG_VERSION"), [Kind::Notify])
//!     }
//!     fn create(_settings: Value, host: Host) -> Result<Self, Failure> {
//!         Ok(Bell { host })
//!     }
//!     fn notifier(&self) -> Option<&dyn Notifier> {
//!         Some(self)
//!     }
//! }
//!
//! impl Notifier for Bell {
//!     fn notify(&self, event: &Value) -> Result<(), Failure> {
//!         self.host.info(&format!("ding: {event}"));
//!         Ok(())
//!     }
//! }
//!
//! export_plugin!(Bell);
//! ```
#![warn(missing_docs)]

pub mod abi;
pub mod glue;
pub mod header;
pub mod host;
pub mod message;
pub mod plugin;

pub use message::{
    AgentProcess, Artifact, Description, Failure, Kind, NotifyRequest, RestoreReply, RestoreRequest, SaveReply,
    SaveRequest, event_matches, event_name,
};
pub use plugin::{Checkpointer, Host, Level, Notifier, Plugin};
