//! Real shims with real processes below them, driven over their sockets as the daemon drives them.
//!
//! One program for all of them: linking it takes longer than its compilation.

#[macro_use]
mod bed;
mod freeze;
mod guard;
mod hooks;
mod logs;
mod reconnect;
mod run;
mod terminal;
