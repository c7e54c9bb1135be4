//! Brings agents to a good place: a message to those that listen, then SIGTSTP.
//!
//! | the agent | outcome | told | after the thaw |
//! |---|---|---|---|
//! | acknowledges on its channel | frozen at once, no SIGTSTP | | runs |
//! | has a channel and says nothing | grace of the channel, then SIGTSTP as below | warning | runs |
//! | stops by default, or saves and stops itself | `Stopped`, as soon as it has | | SIGCONT, runs |
//! | ignores SIGTSTP | `Ignored` when the grace is over | | runs |
//! | waits in vfork(2) for a child that is stopped | `Stopped`, as it stands as still | | runs |
//! | was stopped by somebody else before | `AlreadyStopped` at once | warning | stays stopped |
//! | ends meanwhile | `Exited`, or a refusal: no failure | its exit | |
//! | has jobs in sessions of their own | no SIGTSTP for those, which orphaned groups ignore | | run |
//!
//! Whatever the outcome, the freeze that follows stops the whole tree; this step only decides where.
//! Both mechanisms pass the same tests (`daemon/tests/shim_freeze.rs`, `shim_guard.rs`,
//! `tests/it/pause.rs`).

use std::time::Duration;

use fermata_protocol::rpc::Notification;
use fermata_protocol::{AgentName, RunId, Target};
use serde_json::json;

use crate::errors::Failure;
use crate::operations::{Link, StepContext, side_by_side};
use crate::shims::link::LinkError;
use fermata_shim::wire::QuiesceOutcome;

/// What is asked of the agents.
#[derive(Debug, Clone)]
pub struct Request {
    /// How long they have, when somebody said so; the configured grace otherwise.
    pub grace_ms: Option<u64>,
    /// Why the project is paused.
    pub reason: Option<String>,
    /// The operation.
    pub operation: String,
}

/// Quiesces every run; returns what a person should know.
///
/// An agent that does not come to a good place is no failure: it is frozen where it stands.
///
/// # Errors
/// When a failpoint says so.
pub async fn run(site: &StepContext, runs: &[(AgentName, RunId)], request: &Request) -> Result<Vec<String>, Failure> {
    crate::operations::failpoint("pause.quiesce")?;
    let each = site.links_of(runs).map(|(agent, link)| {
        let (site, agent, link, request) = (site.clone(), agent.clone(), link.clone(), request.clone());
        async move { one(&site, agent, &link, &request).await }
    });
    let mut warnings: Vec<String> = side_by_side(each.collect::<Vec<_>>()).await.into_iter().flatten().collect();
    warnings.sort();
    crate::operations::failpoint("pause.quiesced")?;
    Ok(warnings)
}

async fn one(site: &StepContext, agent: AgentName, link: &Link, request: &Request) -> Option<String> {
    let settings = site.services.settings();
    let target = Target::agent(site.project.name.clone(), agent.clone());
    let channel_grace = Duration::from_millis(request.grace_ms.unwrap_or(settings.pause.channel_grace_ms));
    let notification = Notification::new(
        "pause_requested",
        json!({
            "operation_id": request.operation,
            "reason": request.reason,
            "grace_ms": u64::try_from(channel_grace.as_millis()).unwrap_or(u64::MAX),
        }),
    );
    let mut late = None;
    if let Some(mut acknowledged) = site.services.channels.request_pause(&target, &notification) {
        let all = async {
            for receiver in &mut acknowledged {
                // A channel that closes meanwhile needs no acknowledgement.
                drop(receiver.changed().await);
            }
        };
        match tokio::time::timeout(channel_grace, all).await {
            Ok(()) => return None,
            Err(_) => {
                late = Some(format!(
                    "agent '{agent}' did not acknowledge the pause within {} ms",
                    channel_grace.as_millis()
                ));
            }
        }
    }
    let grace = Duration::from_millis(request.grace_ms.unwrap_or(settings.pause.grace_ms));
    let lease = Duration::from_millis(settings.pause.lease_ms) + grace;
    match link.shim.quiesce(grace, lease).await {
        Ok(quiesced) => match quiesced.outcome {
            // Frozen wherever it stands: what most programs do without harm.
            QuiesceOutcome::Ignored | QuiesceOutcome::Stopped | QuiesceOutcome::Exited => {}
            QuiesceOutcome::AlreadyStopped => {
                return Some(format!("agent '{agent}' had been stopped by somebody else, and will stay so"));
            }
        },
        // An agent that ends just now is no failure; the freeze finds out about everything else.
        Err(LinkError::Closed | LinkError::Refused { .. }) => {}
        Err(error) => return Some(format!("agent '{agent}': {}", fermata_protocol::error_chain(&error))),
    }
    late
}
