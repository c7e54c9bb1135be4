//! Brings agents back: thaws those that are frozen. Those that are started again are launched by
//! the project itself, one [`crate::operations::run::launch`] each.

use std::sync::Arc;
use std::time::Duration;

use fermata_protocol::pause::{AgentResumed, ResumeMethod};
use fermata_protocol::{AgentName, RunId};

use crate::operations::run::launch;
use crate::operations::{StepContext, side_by_side};
use crate::shims::link::{LinkError, ShimLink, read_run};
use crate::shims::reconnect;
use fermata_protocol::error_chain;

/// How often a thaw is tried: a link may just be broken, or its shim wait for a slow disk.
const TRIES: u32 = 4;

/// How long the first try waits for the second; later ones wait longer.
const PAUSE: Duration = Duration::from_millis(100);

/// How long a shim whose link is broken may take to answer at a new one.
const PATIENCE: Duration = Duration::from_secs(5);

/// Thaws these runs and says how each came back.
pub async fn thaw(site: &StepContext, runs: &[(AgentName, RunId)]) -> Vec<AgentResumed> {
    let each = runs.iter().map(|(agent, run)| {
        let (site, agent, run) = (site.clone(), agent.clone(), run.clone());
        async move {
            match thaw_one(&site, &agent, &run).await {
                Ok(()) => AgentResumed { agent, method: ResumeMethod::Thawed, argv: None, detail: None },
                Err(error) => {
                    let run_dir = site.dirs().run(&agent, &run);
                    // What cannot be thawed must not stay behind frozen, or run on unseen later.
                    let left = launch::end_run(&site, &run_dir).await.err();
                    let left = left.map(|failure| format!("; {failure}")).unwrap_or_default();
                    AgentResumed {
                        agent,
                        method: ResumeMethod::Failed,
                        argv: None,
                        detail: Some(format!("{error}{left}")),
                    }
                }
            }
        }
    });
    side_by_side(each.collect::<Vec<_>>()).await
}

async fn thaw_one(site: &StepContext, agent: &AgentName, run: &RunId) -> Result<(), String> {
    let mut link = site.links.get(agent).filter(|link| link.run == *run).map(|link| Arc::clone(&link.shim));
    let mut last = "its processes are gone".to_owned();
    for attempt in 1..=TRIES {
        if link.as_ref().is_none_or(|link| link.is_closed()) {
            link = reconnect(site, agent, run).await.map(Arc::new);
        }
        let Some(shim) = &link else { break };
        match shim.thaw().await {
            Ok(()) => return Ok(()),
            Err(error @ LinkError::Refused { .. }) => return Err(error_chain(&error)),
            Err(error) => last = error_chain(&error),
        }
        tokio::time::sleep(PAUSE * attempt).await;
    }
    Err(last)
}

/// Makes a link of its own to a shim whose other link is broken.
async fn reconnect(site: &StepContext, agent: &AgentName, run: &RunId) -> Option<ShimLink> {
    let record = read_run(&site.dirs().run(agent, run)).ok().flatten()?;
    reconnect::connect(&record, PATIENCE).await.ok().map(|(link, _events)| link)
}
