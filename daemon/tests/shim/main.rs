//! Real shims with real process trees, driven over their sockets as the daemon drives them.
//!
//! One test program for all of them: linking takes longer than compiling.

#[macro_use]
mod bed;
mod freeze;
mod guard;
mod hooks;
mod logs;
mod reconnect;
mod run;
mod terminal;
